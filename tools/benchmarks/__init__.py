"""The cases of tools/bench.py, a file each: a case is a generator of rows."""
