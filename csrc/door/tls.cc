#include "door/tls.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string_view>

namespace twinjet::door {
namespace {

using BioPtr = std::unique_ptr<BIO, decltype(&BIO_free)>;
using CertificatePtr = std::unique_ptr<X509, decltype(&X509_free)>;

[[noreturn]] void Fail(const std::string& what) {
  const unsigned long code = ERR_get_error();
  const char* reason = code == 0 ? nullptr : ERR_reason_error_string(code);
  ERR_clear_error();
  throw std::invalid_argument(reason ? what + ": " + reason : what);
}

BioPtr Open(const std::string& pem) {
  return {BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), &BIO_free};
}

CertificatePtr NextCertificate(BIO* bio) {
  return {PEM_read_bio_X509(bio, nullptr, nullptr, nullptr), &X509_free};
}

void UseCertificate(SSL_CTX* context, const std::string& pem) {
  const BioPtr bio = Open(pem);
  const CertificatePtr own = NextCertificate(bio.get());
  if (!own || SSL_CTX_use_certificate(context, own.get()) != 1) Fail("the TLS certificate cannot be used");
  while (CertificatePtr issuer = NextCertificate(bio.get())) {
    // add0 takes ownership.
    if (SSL_CTX_add0_chain_cert(context, issuer.get()) != 1)
      Fail("the TLS certificate's chain cannot be used");
    static_cast<void>(issuer.release());
  }
  ERR_clear_error();  // the end of the text counts as one
}

void UseKey(SSL_CTX* context, const std::string& pem) {
  const BioPtr bio = Open(pem);
  const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> key(
      PEM_read_bio_PrivateKey(bio.get(), nullptr, nullptr, nullptr), &EVP_PKEY_free);
  if (!key || SSL_CTX_use_PrivateKey(context, key.get()) != 1) Fail("the TLS key cannot be used");
  if (SSL_CTX_check_private_key(context) != 1) Fail("the TLS key does not belong to the certificate");
}

void AskForClientCertificates(SSL_CTX* context, const std::string& pem) {
  const BioPtr bio = Open(pem);
  X509_STORE* store = SSL_CTX_get_cert_store(context);
  int num_trusted = 0;
  while (const CertificatePtr trusted = NextCertificate(bio.get())) {
    if (X509_STORE_add_cert(store, trusted.get()) != 1 ||
        SSL_CTX_add_client_CA(context, trusted.get()) != 1) {
      Fail("a client CA certificate cannot be used");
    }
    ++num_trusted;
  }
  if (num_trusted == 0) Fail("the client CA bundle has no certificate");
  ERR_clear_error();
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
}

// Takes the first protocol of ours that the client offers.
int SelectProtocol(SSL*, const unsigned char** out, unsigned char* out_size, const unsigned char* offered,
                   unsigned int size, void*) {
  for (const std::string_view ours : {std::string_view("h2"), std::string_view("http/1.1")}) {
    for (unsigned int i = 0; i + 1 + offered[i] <= size; i += 1 + offered[i]) {
      if (std::string_view(reinterpret_cast<const char*>(offered) + i + 1, offered[i]) == ours) {
        *out = offered + i + 1;
        *out_size = offered[i];
        return SSL_TLSEXT_ERR_OK;
      }
      if (i + 1 + offered[i] == size) break;
    }
  }
  return SSL_TLSEXT_ERR_ALERT_FATAL;
}

}  // namespace

std::shared_ptr<SSL_CTX> MakeTlsContext(const TlsSettings& settings) {
  ERR_clear_error();
  std::shared_ptr<SSL_CTX> context(SSL_CTX_new(TLS_server_method()), &SSL_CTX_free);
  if (!context) throw std::bad_alloc();
  SSL_CTX_set_min_proto_version(context.get(), TLS1_2_VERSION);
  SSL_CTX_set_options(context.get(), SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  SSL_CTX_set_mode(context.get(), SSL_MODE_RELEASE_BUFFERS);
  static constexpr unsigned char kSessionIdContext[] = "twinjet";
  SSL_CTX_set_session_id_context(context.get(), kSessionIdContext, sizeof kSessionIdContext - 1);
  SSL_CTX_set_alpn_select_cb(context.get(), &SelectProtocol, nullptr);
  UseCertificate(context.get(), settings.certificate_pem);
  UseKey(context.get(), settings.key_pem);
  if (!settings.client_ca_pem.empty()) AskForClientCertificates(context.get(), settings.client_ca_pem);
  return context;
}

// A BIO whose writes append to the stream's records_: so they leave with the records of other connections.
struct ByteStream::Records {
  static int Write(BIO* bio, const char* bytes, size_t size, size_t* num_written) {
    try {
      static_cast<ByteStream*>(BIO_get_data(bio))->records_->append(bytes, size);
    } catch (const std::bad_alloc&) {
      return 0;
    }
    *num_written = size;
    return 1;
  }
  static long Control(BIO*, int what, long, void*) { return what == BIO_CTRL_FLUSH ? 1 : 0; }

  static const BIO_METHOD* Method() {
    static const BIO_METHOD* const method = [] {
      BIO_METHOD* made = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "records");
      if (!made || BIO_meth_set_write_ex(made, &Write) != 1 || BIO_meth_set_ctrl(made, &Control) != 1) {
        throw std::bad_alloc();
      }
      return made;
    }();
    return method;
  }
};

ByteStream::ByteStream(int fd, const std::shared_ptr<SSL_CTX>& tls) : fd_(fd) {
  if (!tls) return;
  ssl_ = SSL_new(tls.get());
  BIO* const records = BIO_new(Records::Method());
  if (!ssl_ || !records || SSL_set_rfd(ssl_, fd) != 1) {
    BIO_free(records);
    SSL_free(ssl_);
    close(fd);
    throw std::bad_alloc();
  }
  BIO_set_data(records, this);
  BIO_set_init(records, 1);
  SSL_set0_wbio(ssl_, records);
  SSL_set_accept_state(ssl_);
}

ByteStream::~ByteStream() {
  SSL_free(ssl_);
  close(fd_);
}

IoResult ByteStream::Read(char* out, size_t size, size_t* num_read, std::string* answer) {
  if (ssl_) {
    ERR_clear_error();
    records_ = answer;
    const int result = SSL_read_ex(ssl_, out, size, num_read);
    if (result == 1) return IoResult::kDone;
    return SSL_get_error(ssl_, result) == SSL_ERROR_WANT_READ ? IoResult::kWouldBlock : IoResult::kClosed;
  }
  while (true) {
    const ssize_t result = recv(fd_, out, size, 0);
    if (result > 0) {
      *num_read = static_cast<size_t>(result);
      return IoResult::kDone;
    }
    if (result == 0) return IoResult::kClosed;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return IoResult::kWouldBlock;
    if (errno != EINTR) return IoResult::kClosed;
  }
}

bool ByteStream::Seal(std::string_view bytes, std::string* out) {
  ERR_clear_error();
  records_ = out;
  while (!bytes.empty()) {
    size_t num_sealed = 0;
    if (SSL_write_ex(ssl_, bytes.data(), bytes.size(), &num_sealed) != 1) return false;
    bytes.remove_prefix(num_sealed);
  }
  return true;
}

void ByteStream::ShutWrite() {
  if (ssl_ && SSL_is_init_finished(ssl_)) {
    ERR_clear_error();
    std::string farewell;
    records_ = &farewell;
    SSL_shutdown(ssl_);
    // To a client that does not read it is of no use.
    [[maybe_unused]] const ssize_t sent = send(fd_, farewell.data(), farewell.size(), MSG_NOSIGNAL);
  }
  shutdown(fd_, SHUT_WR);
}

}  // namespace twinjet::door
