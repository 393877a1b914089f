"""What the fault tests are made of: a federation that records, a proxy and a server that misbehave."""
