"""gspo's one logger: what a program hears of it without asking."""

import logging

log = logging.getLogger("gspo")
