"""Imported first by the server that worker processes fork from.

Ctrl-C is the main process's to handle, and a terminal sends it to all of them: what a worker ignores from its first
instant cannot print a traceback. And the server has imported the script already when a worker runs it as its main
module, which runpy would warn of in each worker.
"""

import signal
import warnings

signal.signal(signal.SIGINT, signal.SIG_IGN)
warnings.filterwarnings("ignore", ".* found in sys.modules after import of package", RuntimeWarning)
