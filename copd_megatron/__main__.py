"""``python -m copd_megatron``, the same as ``copd``; the form torchrun wants: ``torchrun ... -m copd_megatron train``."""
import sys

from copd_megatron.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
