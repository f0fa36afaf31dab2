class _DriverConfig:
    def set_active(self, driver: object) -> None: ...

driver: _DriverConfig
