"""The parts of `kills.py`: where a process is killed, what it was doing, and what is there afterwards."""
