"""Know how wrong your Fisher information is."""
from fimprobe.measure import measure
