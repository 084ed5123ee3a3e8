"""What both sides train with. Imports nothing: both environments use it."""

LEARNING_RATE = 2e-4
BETAS = (0.9, 0.95)
EPSILON = 1e-8
MAX_GRAD_NORM = 1.0
LORA_RANK, LORA_ALPHA = 16, 32
DPO_BETA = 0.1
SWEPT_BETAS = (0.1, 0.2, 0.3)
CENTRING = 0.01
"""Weight of the squared sum of a pair's scores."""
SEED = 11
