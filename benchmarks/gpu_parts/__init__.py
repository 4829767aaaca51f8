"""The parts of `gpu_suite.py`: each module measures one thing and hands its rows to a `Bench`."""
