"""What every room may use: errors, metrics, clocks, files, random draws, tables of text."""
