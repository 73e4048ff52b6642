"""`python -m app.stack`: runs the embedded stack until Ctrl-C."""

import sys

from app.stack.embedded import main

sys.exit(main())
