// TLS for the door: contexts made of PEM text, and what OpenSSL's calls mean for a non-blocking socket.
#pragma once

#include <openssl/ssl.h>

#include <cstddef>
#include <memory>
#include <string>

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

// One connection's stream of bytes, with or without TLS, over a non-blocking socket that it closes.
class ByteStream {
 public:
  // tls: null for plain text.
  ByteStream(int fd, const std::shared_ptr<SSL_CTX>& tls);
  ~ByteStream();
  ByteStream(const ByteStream&) = delete;
  ByteStream& operator=(const ByteStream&) = delete;

  int fd() const { return fd_; }
  // Reads up to size bytes; *num_read is set when kDone.
  IoResult Read(char* out, size_t size, size_t* num_read);
  IoResult Write(const char* bytes, size_t size, size_t* num_written);
  // Whether Read has bytes that the socket no longer shows.
  bool has_pending() const { return ssl_ && SSL_pending(ssl_) > 0; }
  // Whether a Read that would block waits for the socket to take bytes.
  bool does_read_want_write() const { return does_read_want_write_; }
  // Sends no more.
  void ShutWrite();

 private:
  IoResult ExplainTls(int result, bool is_read);

  const int fd_;
  SSL* ssl_ = nullptr;
  bool does_read_want_write_ = false;
};

}  // namespace twinjet::door
