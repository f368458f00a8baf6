"""Include these under ``api/``: ``path("api/", include("chatnest.urls"))``."""

from __future__ import annotations

from django.urls import path

from . import views

app_name = "chatnest"
urlpatterns = [
    path("chat", views.chat, name="chat"),
    path("usage", views.usage, name="usage"),
]
