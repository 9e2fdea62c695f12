"`python -m gp_spectral` is the command `gp-spectral`."
import sys

from .study import main

sys.exit(main())
