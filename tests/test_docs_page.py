"""A4 and C6: /docs works, and nothing on it comes from another host."""

import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from deployments.http_app import create_api
from tests.conftest import InBrowser
