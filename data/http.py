"""HTTP to processes of our own and to engines, past any proxy that the environment names: one for the way out would
answer for them, or refuse, and `no_proxy` comes in forms that Python does not read."""

from urllib.request import ProxyHandler, build_opener

open_directly = build_opener(ProxyHandler({})).open
"""As urllib.request.urlopen."""
