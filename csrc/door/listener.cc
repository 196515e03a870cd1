#include "door/listener.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <strings.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <system_error>

namespace twinjet::door {
namespace {

constexpr int kBacklog = 4096;
constexpr int kNotSentLowBytes = 128 << 10;  // beyond which the kernel would hold what no client reads
constexpr int kPortsToTry = 16;
constexpr std::string_view kUnixPrefix = "unix:";

[[noreturn]] void ThrowErrno(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// Removes the socket of a server that is no more; one that still answers stays, and bind will fail.
void RemoveStaleSocket(const sockaddr_un& address) {
  struct stat found{};
  if (lstat(address.sun_path, &found) != 0 || !S_ISSOCK(found.st_mode)) return;
  const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (probe < 0) return;
  const bool is_refused = connect(probe, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 &&
                          errno == ECONNREFUSED;
  close(probe);
  if (is_refused) unlink(address.sun_path);
}

Listener ListenOnPath(std::string_view path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    throw std::runtime_error("a Unix socket's path must have 1 to " +
                             std::to_string(sizeof address.sun_path - 1) + " bytes");
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  RemoveStaleSocket(address);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) ThrowErrno("socket");
  if (bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      listen(fd, kBacklog) != 0) {
    const int error = errno;
    close(fd);
    throw std::system_error(error, std::generic_category(), "bind");
  }
  return {fd, std::string(path)};
}

// A socket bound to info's address with this port; *port is set to the one it got.
int ListenOnAddress(const addrinfo& info, int* port) {
  const int fd = socket(info.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) ThrowErrno("socket");
  const int on = 1;
  sockaddr_storage address{};
  std::memcpy(&address, info.ai_addr, info.ai_addrlen);
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  // For its connections, which inherit them.
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &kNotSentLowBytes, sizeof kNotSentLowBytes);
  in_port_t* where = nullptr;
  if (info.ai_family == AF_INET6) {
    auto* v6 = reinterpret_cast<sockaddr_in6*>(&address);
    where = &v6->sin6_port;
    // "[::]" is for IPv4, too, as it is with gRPC; and only so an IPv4 address can be written as an IPv6 one.
    const bool is_dual = IN6_IS_ADDR_UNSPECIFIED(&v6->sin6_addr) || IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr);
    const int v6_only = is_dual ? 0 : 1;
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &v6_only, sizeof v6_only);
  } else {
    where = &reinterpret_cast<sockaddr_in*>(&address)->sin_port;
  }
  *where = htons(static_cast<in_port_t>(*port));
  socklen_t size = info.ai_addrlen;
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(fd, kBacklog) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    const int error = errno;
    close(fd);
    throw std::system_error(error, std::generic_category(), "bind");
  }
  *port = ntohs(*where);
  return fd;
}

using AddressList = std::unique_ptr<addrinfo, void (*)(addrinfo*)>;

AddressList Resolve(const std::string& name) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int result = getaddrinfo(name.empty() ? nullptr : name.c_str(), "0", &hints, &found);
  if (result != 0) throw std::runtime_error(gai_strerror(result));
  return {found, &freeaddrinfo};
}

// Whether the machine lacks what the address needs, as one without IPv6 does.
bool IsAbsent(const std::system_error& error) {
  return error.code().value() == EAFNOSUPPORT || error.code().value() == EADDRNOTAVAIL;
}

// All addresses of both families, whichever's wildcard was asked for, as gRPC's library has it.
std::vector<Listener> ListenOnAll(int* port) {
  try {
    return {{ListenOnAddress(*Resolve("::"), port), {}}};
  } catch (const std::system_error& error) {
    if (!IsAbsent(error)) throw;
    return {{ListenOnAddress(*Resolve("0.0.0.0"), port), {}}};
  }
}

std::vector<Listener> ListenOnEach(const std::vector<const addrinfo*>& addresses, int* port) {
  std::vector<Listener> listeners;
  try {
    for (size_t i = 0; i < addresses.size(); ++i) {
      try {
        listeners.push_back({ListenOnAddress(*addresses[i], port), {}});
      } catch (const std::system_error& error) {
        // A machine without IPv6 still resolves "localhost" to ::1.
        const bool is_last_hope = i + 1 == addresses.size() && listeners.empty();
        if (!IsAbsent(error) || is_last_hope) throw;
      }
    }
  } catch (...) {
    for (const Listener& listener : listeners) close(listener.fd);
    throw;
  }
  return listeners;
}

}  // namespace

std::vector<Listener> ListenOn(const std::string& host, int* port) {
  if (host.starts_with(kUnixPrefix)) return {ListenOnPath(std::string_view(host).substr(kUnixPrefix.size()))};
  std::string name = host;
  if (name.size() > 2 && name.front() == '[' && name.back() == ']') name = name.substr(1, name.size() - 2);
  if (name == "0.0.0.0" || name == "::") return ListenOnAll(port);
  AddressList found = Resolve(name);
  // Both loopback addresses, whatever the resolver says, as RFC 6761 and gRPC have it.
  AddressList other{nullptr, &freeaddrinfo};
  if (strcasecmp(name.c_str(), "localhost") == 0) {
    found = Resolve("127.0.0.1");
    other = Resolve("::1");
  }
  std::vector<const addrinfo*> addresses;
  for (const AddressList* list : {&found, &other}) {
    for (const addrinfo* info = list->get(); info; info = info->ai_next) {
      if (info->ai_family == AF_INET || info->ai_family == AF_INET6) addresses.push_back(info);
    }
  }
  const bool is_any_port = *port == 0;
  for (int num_left = kPortsToTry;; --num_left) {
    try {
      return ListenOnEach(addresses, port);
    } catch (const std::system_error& error) {
      // A port that is free at one address need not be so at the next.
      if (!is_any_port || num_left == 0 || error.code().value() != EADDRINUSE) throw;
      *port = 0;
    }
  }
}

std::string PeerName(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = {};
  if (address.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
    return "ipv4:" + std::string(text) + ":" + std::to_string(ntohs(v4.sin_port));
  }
  if (address.ss_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
    if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) {
      inet_ntop(AF_INET, &v6.sin6_addr.s6_addr[12], text, sizeof text);
      return "ipv4:" + std::string(text) + ":" + std::to_string(ntohs(v6.sin6_port));
    }
    inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
    const std::string zone = v6.sin6_scope_id == 0 ? "" : "%25" + std::to_string(v6.sin6_scope_id);
    return "ipv6:%5B" + std::string(text) + zone + "%5D:" + std::to_string(ntohs(v6.sin6_port));
  }
  return "unix:";
}

std::string ClientKey(const sockaddr_storage& address, int ipv6_prefix) {
  if (address.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    return {reinterpret_cast<const char*>(&v4.sin_addr), sizeof v4.sin_addr};
  }
  if (address.ss_family != AF_INET6) return {};
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
  const std::string whole(reinterpret_cast<const char*>(v6.sin6_addr.s6_addr), sizeof v6.sin6_addr.s6_addr);
  if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) return whole.substr(12);
  const auto num_whole_bytes = static_cast<size_t>(ipv6_prefix / 8);
  std::string key = whole.substr(0, num_whole_bytes);
  if (ipv6_prefix % 8 != 0) {
    key += static_cast<char>(whole[num_whole_bytes] & (0xff00 >> (ipv6_prefix % 8)));
  }
  return key.append("%").append(std::to_string(v6.sin6_scope_id));
}

}  // namespace twinjet::door
