"""The night shift: learns from the votes."""

import os

# Read when torch is loaded. Threads that wait for one another in a busy loop lose their core to whoever else computes,
# and all of them stand still meanwhile: beside a busy engine, training on 2 cores was 25 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
