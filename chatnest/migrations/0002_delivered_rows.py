from django.db import migrations

# Frozen here, as a migration must be; chatnest.limits.DEFAULT_PROFILES serves where a row is missing.
PROFILES = [
    ("constrained", 150, 4, 0.5, 30_000, 2048, 15, 2),
    ("balanced", 400, 6, 0.7, 70_000, 2048, 30, 4),
    ("expanded", 3000, 12, 0.8, 200_000, 12_000, 60, 8),
]


def create_profiles(apps, schema_editor):
    Profile = apps.get_model("chatnest", "Profile")
    for name, output, messages, temperature, daily, request, rate, streams in PROFILES:
        Profile.objects.using(schema_editor.connection.alias).get_or_create(
            name=name,
            defaults={
                "max_output_tokens": output,
                "max_messages": messages,
                "temperature": temperature,
                "daily_token_limit": daily,
                "max_tokens_per_request": request,
                "rate_max_requests": rate,
                "rate_window_seconds": 60,
                "max_concurrent_streams": streams,
            },
        )


def create_accounts(apps, schema_editor):
    Account = apps.get_model("chatnest", "Account")
    for name in ("site", "anonymous"):
        Account.objects.using(schema_editor.connection.alias).get_or_create(name=name)


class Migration(migrations.Migration):
    dependencies = [("chatnest", "0001_initial")]
    operations = [
        migrations.RunPython(create_profiles, migrations.RunPython.noop),
        migrations.RunPython(create_accounts, migrations.RunPython.noop),
    ]
