"""Imported first by the server that worker processes fork from: Ctrl-C is the main process's to answer.

A terminal sends it to all of them. What a worker ignores from its first instant cannot print a traceback.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
