"""One layout for each provider of machines: it draws what fleet and lock decided, and decides nothing."""
