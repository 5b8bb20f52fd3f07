"""The day shift: answers people, asks them which answer is better, swaps policies."""
