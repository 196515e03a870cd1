#include "door/carrier.h"

#include <algorithm>
#include <vector>

#include "door/mailbox.h"

namespace twinjet::door {

bool StreamCarrier::HasRoom(const std::shared_ptr<void>& call) {
  const Call& known = *static_cast<const Call*>(call.get());
  return known.is_over() || known.unsent_bytes() <= static_cast<int64_t>(write_ahead_bytes_);
}

void StreamCarrier::Carry(std::span<const Parcel> parcels) {
  std::vector<Outgoing> messages;
  std::vector<Mailbox*> mailboxes;
  messages.reserve(parcels.size());
  for (const Parcel& parcel : parcels) {
    CallRef call = std::static_pointer_cast<Call>(parcel.call);
    if (std::ranges::find(mailboxes, call->mailbox()) == mailboxes.end())
      mailboxes.push_back(call->mailbox());
    messages.push_back({std::move(call), parcel.bytes});
  }
  for (Mailbox* mailbox : mailboxes) mailbox->PostMessages(messages);
}

}  // namespace twinjet::door
