"""Where the models of these tests compute: KRAIT_TEST_DEVICE=cuda is a GPU."""

import os

DEVICE = os.environ.get("KRAIT_TEST_DEVICE", "cpu")
# Between two ways to one result, for the bundled model: its weights have 16 bits, to which a GPU
# rounds what many tokens are multiplied with, but not what one token is.
CLOSE = 1e-4 if DEVICE == "cpu" else 2e-2
