"""`python -m kling_voice`, the same as `kling-voice`."""

import sys

from kling_voice.cli import main

sys.exit(main())
