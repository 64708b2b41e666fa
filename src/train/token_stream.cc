#include "train/token_stream.h"

#include <algorithm>

#include "krait/core/error.h"

namespace krait::dataset {

std::int64_t StreamPart::size() const {
  return std::visit([](const auto& span) { return static_cast<std::int64_t>(span.size()); }, ids);
}

void TokenStream::add(StreamPart part) {
  if (part.size() == 0) return;
  begins_.push_back(size_);
  size_ += part.size();
  documents_ += static_cast<std::int64_t>(part.document_ends.size());
  parts_.push_back(std::move(part));
}

std::size_t TokenStream::part_at(std::int64_t position) const {
  const auto after = std::upper_bound(begins_.begin(), begins_.end(), position);
  return static_cast<std::size_t>(after - begins_.begin()) - 1;
}

void TokenStream::read(std::int64_t begin, std::span<std::int64_t> out) const {
  if (out.empty()) return;
  for (std::size_t p = part_at(begin); !out.empty(); ++p) {
    const StreamPart& part = parts_[p];
    const auto first = static_cast<std::size_t>(begin - begins_[p]);
    const std::size_t count = std::min(out.size(), static_cast<std::size_t>(part.size()) - first);
    std::visit(
        [&](const auto& ids) {
          std::copy_n(ids.begin() + static_cast<std::ptrdiff_t>(first), count, out.begin());
        },
        part.ids);
    const auto bad = std::find_if(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(count),
                                  [&](std::int64_t id) { return id >= vocab_size_; });
    const auto place = static_cast<std::size_t>(bad - out.begin());
    require(place == count, part.name, ": token ", first + place, " has the id ", place == count ? 0 : *bad,
            ", expected ids below ", vocab_size_);
    out = out.subspan(count);
    begin += static_cast<std::int64_t>(count);
  }
}

std::int64_t TokenStream::next_document_end(std::int64_t position) const {
  if (position >= size_) return size_;
  const std::size_t p = part_at(position);
  const auto& ends = parts_[p].document_ends;
  // There is one: a document ends with each part.
  return begins_[p] + static_cast<std::int64_t>(*std::upper_bound(
                          ends.begin(), ends.end(), static_cast<std::uint64_t>(position - begins_[p])));
}

PartBuilder::PartBuilder(std::string name, std::int64_t vocab_size)
    : name_(std::move(name)), vocab_size_(vocab_size), memory_(std::make_shared<Memory>()) {
  if (vocab_size > kNarrowVocabulary) memory_->ids = std::vector<Wide>();
}

std::int64_t PartBuilder::size() const {
  return std::visit([](const auto& ids) { return static_cast<std::int64_t>(ids.size()); }, memory_->ids);
}

void PartBuilder::append(std::span<const std::int64_t> ids, std::span<const std::size_t> document_ends) {
  for (const std::size_t end : document_ends) end_document_at(static_cast<std::uint64_t>(size()) + end);
  const auto bad =
      std::find_if(ids.begin(), ids.end(), [&](std::int64_t id) { return id < 0 || id >= vocab_size_; });
  require(bad == ids.end(), name_, ": has the token id ", bad == ids.end() ? 0 : *bad,
          ", expected ids from 0 to ", vocab_size_ - 1, " (the vocabulary has ", vocab_size_, " tokens)");
  std::visit(
      [&](auto& kept) {
        using Id = typename std::decay_t<decltype(kept)>::value_type;
        const std::size_t before = kept.size();
        kept.resize(before + ids.size());
        std::transform(ids.begin(), ids.end(), kept.begin() + static_cast<std::ptrdiff_t>(before),
                       [](std::int64_t id) { return static_cast<Id>(id); });
      },
      memory_->ids);
}

// Nothing where there is nothing since the last end.
void PartBuilder::end_document_at(std::uint64_t token) {
  auto& ends = memory_->document_ends;
  if (token > (ends.empty() ? 0 : ends.back())) ends.push_back(token);
}

StreamPart PartBuilder::take() {
  end_document_at(static_cast<std::uint64_t>(size()));
  StreamPart part{.name = name_, .ids = {}, .document_ends = memory_->document_ends, .owner = memory_};
  std::visit([&](const auto& ids) { part.ids = std::span(ids); }, memory_->ids);
  memory_ = std::make_shared<Memory>();
  return part;
}

}  // namespace krait::dataset
