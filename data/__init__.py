"""What both shifts share: settings, words, the record. Knows neither torch nor fastapi."""
