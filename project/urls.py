from __future__ import annotations

from django.contrib import admin
from django.urls import URLPattern, URLResolver, include, path

from project import views

urlpatterns: list[URLPattern | URLResolver] = [
    path("", views.home, name="home"),
    path("admin/", admin.site.urls),
    path("api/", include("chatnest.urls")),
]
