"`python -m gp_spectral` is the command `gp-spectral`."
import sys

from .cli import main

sys.exit(main())
