"""A site laid out as cookiecutter-django lays one out, before chatnest is added to it.

``config/`` and ``ours/`` are the site's own folders, and what they need is in ``requirements.txt``;
``tests/test_cookiecutter.py`` copies them, adds what README.md says, and nothing else, and tells the stories.
See https://github.com/cookiecutter/cookiecutter-django.
"""
