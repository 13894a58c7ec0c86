"""The fixture as an author's tests have it."""

from ublkpool.testing import check_backend as check_backend
