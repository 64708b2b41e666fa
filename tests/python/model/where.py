"""Where the models of these tests compute: KRAIT_TEST_DEVICE=cuda is a GPU."""

import os

DEVICE = os.environ.get("KRAIT_TEST_DEVICE", "cpu")
