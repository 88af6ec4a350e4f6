"""The parts of ``bench/evidence.py``: what each draws, and the numbers that it takes from the pictures."""
