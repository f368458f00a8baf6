from __future__ import annotations

from django.contrib import admin
from django.contrib.auth.views import LoginView, LogoutView
from django.urls import URLPattern, URLResolver, include, path
from django.views.i18n import JavaScriptCatalog

from project import views

urlpatterns: list[URLPattern | URLResolver] = [
    path("", views.home, name="home"),
    path("login/", LoginView.as_view(template_name="project/login.html"), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("admin/", admin.site.urls),
    path("api/", include("chatnest.urls")),
    path("jsi18n/", JavaScriptCatalog.as_view(packages=["project"]), name="javascript-catalog"),
]
