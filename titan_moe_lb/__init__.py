"""MoE load balancing for torchtitan.

``__init__.pyi`` lists the public names, for type checkers and at run time. Each is imported at its
first use, so that importing the package is instant.
"""

import lazy_loader

from titan_moe_lb.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
