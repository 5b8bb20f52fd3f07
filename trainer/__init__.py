"""The night shift: learns from the votes."""
