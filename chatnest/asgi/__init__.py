"""For a site's ``asgi.py``, optional: ``application = for_streaming(get_asgi_application())``.

What stands in for Django's or asgiref's own parts lives in this folder only.
"""

from .application import for_streaming

__all__ = ["for_streaming"]
