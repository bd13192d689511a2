"""Train one pooling layout from scratch: accelerate launch train.py --help"""

import sys

from bmsn_zoo.training import main

if __name__ == "__main__":
    sys.exit(main())
