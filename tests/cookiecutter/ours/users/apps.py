from django.apps import AppConfig


class UsersConfig(AppConfig):
    name = "ours.users"
