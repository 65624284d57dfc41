"""What every test starts from."""

import os

os.environ["COLUMNS"] = "200"
"""Tables are as wide wherever the tests run; rich looks when its console is made."""
