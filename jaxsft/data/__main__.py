"""python -m jaxsft.data: see show.py."""

import sys

from jaxsft.data.show import main

if __name__ == "__main__":
  sys.exit(main())
