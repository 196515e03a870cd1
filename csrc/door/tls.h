// TLS for the door: contexts made of PEM text, and what OpenSSL's calls mean for a non-blocking socket.
#pragma once

#include <openssl/ssl.h>

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace twinjet::door {

struct TlsSettings {
  std::string certificate_pem;  // the server's, then its chain
  std::string key_pem;
  std::string client_ca_pem;  // not empty: clients must show a certificate that one of these signed
};

// TLS 1.2 and later, ALPN "h2" (and "http/1.1", so that such a client can be told what this port is).
// Throws std::invalid_argument if the settings do not work, saying which.
std::shared_ptr<SSL_CTX> MakeTlsContext(const TlsSettings& settings);

enum class IoResult { kDone, kWouldBlock, kClosed };

// What one connection reads, and how its bytes look on the wire, with or without TLS; over a non-blocking
// socket that it closes. It sends nothing but its end: what TLS has to say is appended to what its user
// sends.
class ByteStream {
 public:
  // tls: null for plain text.
  ByteStream(int fd, const std::shared_ptr<SSL_CTX>& tls);
  ~ByteStream();
  ByteStream(const ByteStream&) = delete;
  ByteStream& operator=(const ByteStream&) = delete;

  int fd() const { return fd_; }
  bool has_tls() const { return ssl_ != nullptr; }
  // Reads up to size bytes; *num_read is set when kDone. Appends to *answer what TLS answers, also when
  // kWouldBlock or kClosed.
  IoResult Read(char* out, size_t size, size_t* num_read, std::string* answer);
  // Whether Read has bytes that the socket no longer shows.
  bool has_pending() const { return ssl_ && SSL_pending(ssl_) > 0; }
  // With TLS, once something was read: appends the records that carry bytes to *out. False: the connection
  // is beyond help.
  bool Seal(std::string_view bytes, std::string* out);
  // Sends no more.
  void ShutWrite();

 private:
  struct Records;

  const int fd_;
  SSL* ssl_ = nullptr;
  std::string* records_ = nullptr;  // where TLS writes, during a call
};

}  // namespace twinjet::door
