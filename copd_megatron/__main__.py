"""``python -m copd_megatron``: the same as ``copd``, in the form that torchrun wants."""

import sys

from copd_megatron.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
