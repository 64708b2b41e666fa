#include "krait/io/npy.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "io/layout.h"
#include "io/text.h"
#include "krait/core/error.h"
#include "krait/io/atomic_file.h"
#include "krait/io/mapped_file.h"

namespace krait::io {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::size_t kVersionEnd = 8;  // the magic, then a major and a minor version
constexpr std::size_t kAlignment = 64;

// NumPy's type codes without the sign of the byte order.
constexpr std::array<std::pair<std::string_view, DType>, 12> kTypes{{{"f4", DType::f32},
                                                                     {"f8", DType::f64},
                                                                     {"f2", DType::f16},
                                                                     {"V2", DType::bf16},
                                                                     {"i1", DType::i8},
                                                                     {"u1", DType::u8},
                                                                     {"i2", DType::i16},
                                                                     {"i4", DType::i32},
                                                                     {"i8", DType::i64},
                                                                     {"b1", DType::boolean},
                                                                     {"c8", DType::c64},
                                                                     {"c16", DType::c128}}};

struct Header {
  DType dtype = DType::f32;
  bool is_unsigned = false;  // of 2, 4 or 8 bytes: read as the signed type of that size, then widened
  bool fortran_order = false;
  Dims shape;
};

struct ElementType {
  DType dtype = DType::f32;
  bool is_unsigned = false;
};

ElementType element_type_from(std::string_view descr, const std::string& file) {
  const char order = descr.empty() ? '\0' : descr[0];
  const bool has_order = order == '<' || order == '>' || order == '|' || order == '=';
  std::string code(descr.substr(has_order ? 1 : 0));
  const bool is_unsigned = code == "u2" || code == "u4" || code == "u8";
  if (is_unsigned) code[0] = 'i';
  const auto* found = std::find_if(kTypes.begin(), kTypes.end(), [&](auto& t) { return t.first == code; });
  require(has_order && found != kTypes.end(), file, ": has elements of type ", printable(descr),
          ", expected f2, f4, f8, i1 to i8, u1 to u8, b1, c8, c16 or V2");
  require(order != '>' || size_of(found->second) == 1, file, ": has big-endian elements (", printable(descr),
          "), expected little-endian ones");
  return {.dtype = found->second, .is_unsigned = is_unsigned};
}

// The header is a Python dict with three known keys. This reads that and no more of the language.
class HeaderParser {
 public:
  HeaderParser(std::string_view text, const std::string& file) : rest_(text), file_(file) {}

  Header parse() {
    std::optional<ElementType> element;
    std::optional<bool> fortran_order;
    std::optional<Dims> shape;
    expect('{');
    while (!accept('}')) {
      const std::string_view key = quoted_text();
      expect(':');
      if (key == "descr" && !element)
        element = element_type_from(descr(), file_);
      else if (key == "fortran_order" && !fortran_order)
        fortran_order = boolean();
      else if (key == "shape" && !shape)
        shape = checked_dims(tuple(), file_);
      else
        fail_at(concat("the key ", printable(key), ", which is unknown or there twice"));
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    skip_space();
    if (!rest_.empty()) fail_at("text after the header");
    require(element && fortran_order && shape, file_, ": has a header without descr, fortran_order or shape");
    return {.dtype = element->dtype,
            .is_unsigned = element->is_unsigned,
            .fortran_order = *fortran_order,
            .shape = *shape};
  }

 private:
  [[noreturn]] void fail_at(const std::string& found) const {
    fail(ErrorKind::invalid_argument, file_, ": has a damaged header: ", found, ", before ",
         printable(rest_.substr(0, 20)));
  }
  void skip_space() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\n"), rest_.size())); }
  bool accept(char c) {
    skip_space();
    if (!rest_.starts_with(c)) return false;
    rest_.remove_prefix(1);
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail_at(concat("no ", c));
  }
  std::string_view quoted_text() {
    skip_space();
    const char quote = rest_.empty() ? '\0' : rest_[0];
    const std::size_t end = quote == '\'' || quote == '"' ? rest_.find(quote, 1) : std::string_view::npos;
    if (end == std::string_view::npos) fail_at("no text in quotation marks");
    const std::string_view text = rest_.substr(1, end - 1);
    rest_.remove_prefix(end + 1);
    return text;
  }
  std::string_view descr() {
    skip_space();
    require(!rest_.starts_with('['), file_, ": has elements with fields, expected plain numbers");
    return quoted_text();
  }
  bool boolean() {
    skip_space();
    for (const auto& [word, value] : {std::pair(std::string_view("True"), true), {"False", false}}) {
      if (!rest_.starts_with(word)) continue;
      rest_.remove_prefix(word.size());
      return value;
    }
    fail_at("neither True nor False");
  }
  std::vector<std::int64_t> tuple() {
    std::vector<std::int64_t> sizes;
    expect('(');
    while (!accept(')')) {
      skip_space();
      std::int64_t size = 0;
      const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), size);
      if (error != std::errc{}) fail_at("no whole number below 2^63");
      rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
      sizes.push_back(size);
      if (!accept(',')) {
        expect(')');
        break;
      }
    }
    return sizes;
  }

  std::string_view rest_;
  const std::string& file_;
};

// Unsigned integers, seen as signed ones of their size, as i64.
Tensor from_unsigned(const Tensor& view, const std::string& file) {
  const Tensor wide = view.to(DType::i64).clone();
  const std::size_t bits = 8 * size_of(view.dtype());
  for (std::int64_t& value : wide.span<std::int64_t>()) {
    if (bits < 64)
      value &= (std::int64_t{1} << bits) - 1;
    else
      require(value >= 0, file, ": has an element of 2^63 or more, expected at most 2^63 - 1");
  }
  return wide;
}

Dims fortran_strides(const Dims& shape) {
  Dims strides = shape;
  std::int64_t step = 1;
  for (int i = 0; i < shape.size(); ++i) {
    strides[i] = step;
    step *= std::max<std::int64_t>(shape[i], 1);
  }
  return strides;
}

// The code with its byte order, as NumPy writes it.
std::string descr_of(DType dtype) {
  const auto* found = std::find_if(kTypes.begin(), kTypes.end(), [&](auto& t) { return t.second == dtype; });
  return concat(size_of(dtype) == 1 ? '|' : '<', found->first);
}

}  // namespace

Tensor parse_npy(std::span<const std::byte> bytes, std::shared_ptr<void> owner, const std::string& name) {
  require(bytes.size() >= kVersionEnd && text_of(bytes).starts_with(kMagic), name,
          ": does not begin as a .npy file does");
  const auto major = std::to_integer<int>(bytes[6]);
  require(major >= 1 && major <= 3, name, ": has version ", major, " of the .npy format, expected 1 to 3");
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  require(bytes.size() >= kVersionEnd + length_bytes, name, ": is cut short in its header");
  const std::size_t length =
      major == 1 ? load<std::uint16_t>(bytes, kVersionEnd) : load<std::uint32_t>(bytes, kVersionEnd);
  const auto after = bytes.subspan(kVersionEnd + length_bytes);
  require(length <= after.size(), name, ": claims a header of ", length, " bytes, but only ", after.size(),
          " are left");
  const Header header = HeaderParser(text_of(after.first(length)), name).parse();
  const auto data = after.subspan(length);
  const std::size_t expected = checked_nbytes(header.shape, header.dtype, name);
  require(data.size() == expected, name, ": has ", data.size(), " bytes of elements, expected ", expected,
          " for shape ", header.shape, " of ", header.dtype);
  const Bytes usable = usable_as({.data = data, .owner = std::move(owner)}, header.dtype, name);
  const Tensor view = view_of(
      usable, header.shape,
      header.fortran_order ? fortran_strides(header.shape) : contiguous_strides(header.shape), header.dtype);
  return header.is_unsigned ? from_unsigned(view, name) : view;
}

Tensor read_npy(const std::filesystem::path& path) {
  const auto file = MappedFile::open(path);
  return parse_npy(file->bytes(), file, path.string());
}

void write_npy(const std::filesystem::path& path, const Tensor& tensor) {
  require_writable(tensor, concat(path.string(), ": the tensor"));
  std::string header = concat("{'descr': '", descr_of(tensor.dtype()),
                              "', 'fortran_order': False, 'shape': ", tensor.shape(), ", }");
  // Spaces up to a newline that ends at a multiple of 64 bytes. Eight dimensions always fit version 1.
  const std::size_t before = kVersionEnd + 2;
  header.append((kAlignment - (before + header.size() + 1) % kAlignment) % kAlignment, ' ');
  header += '\n';
  const auto length = static_cast<std::uint16_t>(header.size());

  AtomicFile file(path);
  file.write(kMagic);
  file.write(std::string_view("\x01\x00", 2));
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(header);
  file.write(bytes_of(tensor.contiguous()));
  file.commit();
}

}  // namespace krait::io
