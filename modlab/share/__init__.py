"To and from everyone else."
