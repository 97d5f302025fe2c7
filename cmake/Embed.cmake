# SPDX-License-Identifier: Apache-2.0
# collegium_embed(<output.cpp> <function> <files>): a table of (file stem, text) compiled into the program, so that names in
# a catalogue work from every folder.
function(collegium_embed output function)
  set(entries "")
  foreach(file ${ARGN})
    file(READ ${file} text)
    get_filename_component(stem ${file} NAME_WLE)
    string(APPEND entries "      {\"${stem}\", R\"__embedded__(${text})__embedded__\"},\n")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
  endforeach()
  file(CONFIGURE OUTPUT ${output} @ONLY CONTENT [=[// Generated from the files of configs/.
#include "collegium/plan/embedded.h"

namespace collegium::plan {

const std::vector<EmbeddedFile>& @function@() {
  static const std::vector<EmbeddedFile> files = {
@entries@  };
  return files;
}

}  // namespace collegium::plan
]=])
endfunction()
