#include "door/call.h"

#include <utility>

#include "door/mailbox.h"
#include "door/wire.h"

namespace twinjet::door {

bool IsSendable(const MetadataEntry& entry) {
  if (!IsMetadataKey(entry.key)) return false;
  if (entry.key == "content-type" || entry.key == "te") return false;
  if (entry.key.starts_with("grpc-") && entry.key != "grpc-status-details-bin") return false;
  return IsBinaryKey(entry.key) || IsAsciiValue(entry.value);
}

std::unique_ptr<Place> Place::Take(std::shared_ptr<Totals> totals, size_t max_open) {
  auto place = std::unique_ptr<Place>(new Place(std::move(totals)));
  return place->totals_->open <= static_cast<int64_t>(max_open) ? std::move(place) : nullptr;
}

Place::Place(std::shared_ptr<Totals> totals) : totals_(std::move(totals)) { ++totals_->open; }

Place::~Place() { --totals_->open; }

Call::Call(uint64_t id, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<Totals> totals,
           std::shared_ptr<Client> client, std::shared_ptr<std::atomic<int64_t>> held_by_connection)
    : id_(id),
      mailbox_(std::move(mailbox)),
      totals_(std::move(totals)),
      client_(std::move(client)),
      held_by_connection_(std::move(held_by_connection)) {
  ++totals_->calls;
  ++*held_by_connection_;
}

Call::~Call() {
  --totals_->calls;
  --*held_by_connection_;
  totals_->received_bytes -= received_bytes_.load();
  client_->received_bytes -= received_bytes_.load();
}

void Call::CountUnsent(size_t message_bytes) {
  unsent_bytes_ += static_cast<int64_t>(message_bytes + kPrefixBytes);
}

bool Call::AwaitRoom(size_t write_ahead_bytes) {
  if (unsent_bytes() <= static_cast<int64_t>(write_ahead_bytes)) return false;
  wants_room_ = true;
  // The loop subtracts first and looks at wants_room_ then: one of the two sees the other's store. If the
  // loop has taken the request meanwhile, its event comes.
  if (unsent_bytes() > static_cast<int64_t>(write_ahead_bytes) && !is_over()) return true;
  return !wants_room_.exchange(false);
}

}  // namespace twinjet::door
