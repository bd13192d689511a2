"""Search where a convolutional network should downsample: accelerate launch search.py --help"""

import sys

from bmsn_zoo.searching import main

if __name__ == "__main__":
    sys.exit(main())
