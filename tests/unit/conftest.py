"""What all unit tests have in common: no clock decides one."""

from hypothesis import HealthCheck, settings

# A busy machine is slow, and hypothesis would take a slow example for a failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
