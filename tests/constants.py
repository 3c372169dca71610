"""The instance, its commands and the tenant's network that tests use, whatever they run against."""

from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    SleepInstance,
    StartInstance,
    StopInstance,
    TenantNet,
    WakeInstance,
)

REF = InstanceRef("acme", "web", "i-1")
NAMES = (REF.tenant_id, REF.pool_id, REF.instance_id)
START = StartInstance(*NAMES)
STOP = StopInstance(*NAMES)
SLEEP = SleepInstance(*NAMES, force=False)
WAKE = WakeInstance(*NAMES)
DESTROY = DestroyInstance(*NAMES, wipe_volumes=True)
NET_ID = 3
NET = TenantNet(NET_ID, "10.240.3.0/24", "10.240.3.1", "br-tenant-3")
