"""What this package uses of sacreBLEU 2.4 and later, which returns Any where it matters here."""
