"""A site with django-tenants, on PostgreSQL: chatnest is shared by its tenants, and is refused as one's own app."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from chatnest.testing import FakeUpstream

from .client import Client
from .settings import POSTGRES
from .test_readme import Site

SETTINGS = """
INSTALLED_APPS.remove("chatnest")
TENANT_APPS = [*INSTALLED_APPS]
SHARED_APPS = ["django_tenants", "tenants", "chatnest", *INSTALLED_APPS]
INSTALLED_APPS = SHARED_APPS
TENANT_MODEL, TENANT_DOMAIN_MODEL = "tenants.Tenant", "tenants.Domain"
DATABASE_ROUTERS = ["django_tenants.routers.TenantSyncRouter"]
MIDDLEWARE.insert(0, "django_tenants.middleware.main.TenantMainMiddleware")
CHATNEST["PAYER"] = lambda request, accounts: [f"{request.tenant.schema_name}:7"]
"""
MODELS = """
from django.db import models
from django_tenants.models import DomainMixin, TenantMixin
class Tenant(TenantMixin):
    auto_create_schema = True
class Domain(DomainMixin):
    pass
"""
PEOPLE = """
from tenants.models import *
for name in ("acme", "initech"):
    tenant = Tenant.objects.create(schema_name=name)
    Domain.objects.create(domain=f"{name}.localhost", tenant=tenant, is_primary=True)
"""
PAYERS = "from chatnest.models import *; print([r.payer for r in Reservation.objects.order_by('created_at')])"


@pytest.fixture
def database() -> Iterator[str]:
    with psycopg.connect(POSTGRES.get_uri(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE tenants")
        info = connection.info
        entry = {"NAME": "tenants", "USER": info.user, "PASSWORD": info.password, "HOST": info.host, "PORT": info.port}
        yield repr({"ENGINE": "django_tenants.postgresql_backend", **entry})
        connection.execute("DROP DATABASE tenants WITH (FORCE)")


def test_tenants_share_the_ledger(tmp_path: Path, database: str) -> None:
    with FakeUpstream() as upstream:
        site = Site(tmp_path, upstream)
        (tmp_path / "tenants").mkdir()
        (tmp_path / "tenants" / "__init__.py").touch()
        (tmp_path / "tenants" / "models.py").write_text(MODELS)
        site.add("settings", SETTINGS, f"DATABASES = {{'default': {database}}}")
        site.manage("check")
        site.manage("makemigrations", "tenants", "--verbosity", "0")
        site.manage("migrate_schemas", "--verbosity", "0")
        site.manage("shell", "-c", PEOPLE)
        with site.served() as running:
            for name in ("acme", "initech"):
                assert Client(running.port, Host=f"{name}.localhost").chat().events[-1] == "done"
        assert "['acme:7', 'initech:7']" in site.manage("shell", "-c", PAYERS)

        for shared in (["chatnest"], []):  # in the tenants' apps too, or only there
            site.add("settings", 'TENANT_APPS = [*TENANT_APPS, "chatnest"]')
            site.add("settings", f'SHARED_APPS = [app for app in SHARED_APPS if app != "chatnest"] + {shared}')
            site.add("settings", 'INSTALLED_APPS = list(dict.fromkeys([*SHARED_APPS, "chatnest"]))')
            with pytest.raises(AssertionError, match=r"chatnest\.E030"):
                site.manage("check")
