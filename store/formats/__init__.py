"""File formats in and out: plain data to files and back, without knowledge of run folders."""
