// Sockets that a door listens on, and the names of those who come.
#pragma once

#include <sys/socket.h>

#include <string>
#include <vector>

namespace twinjet::door {

struct Listener {
  int fd;
  std::string unlink_path;  // of a Unix socket, to be removed at the end
};

// Listens on every address that host means: a name, an IPv4 or IPv6 address, with or without brackets, or
// "unix:PATH" (port is ignored then). "0.0.0.0" and "::" are both families' addresses, "localhost" both
// loopback addresses, where the machine has them. *port 0: picks one free port for all and stores it. Throws
// std::system_error or std::runtime_error saying what failed; then nothing is left open.
std::vector<Listener> ListenOn(const std::string& host, int* port);

// As gRPC writes peers: "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234", "ipv6:%5Bfe80::1%252%5D:1234", "unix:".
std::string PeerName(const sockaddr_storage& address);

// Whom a connection counts for, as bytes: its IPv4 address, also one that is written as IPv6; or the first
// ipv6_prefix bits of its IPv6 address, and its zone. Empty: a Unix socket.
std::string ClientKey(const sockaddr_storage& address, int ipv6_prefix);

}  // namespace twinjet::door
